"""Peers: what users fetch objects with today, each behind the same two calls.

A peer is a module with ``prepare(job)``, which does what is not measured (imports, clients)
and returns a function without arguments that fetches the object into ``job.path``. The
function returns None, or, where another process did the work, the peak RSS of that one.
"""

"""HTTP/1.1 for the fetch path: strict, watchable, and without a copy that it can avoid.

Our own instead of ``http.client`` because a GET must be able to go on after a receive
time-out, and because plain HTTP can be spliced (docs/decisions/001-own-response-reader.md
has the figures). Framing follows RFC 9112; what is not clear is refused, and the connection
is not used again.
"""

"""One outside thing each, behind the ports."""

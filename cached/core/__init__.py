"""Pure decisions: events in, effects out. No I/O, clock, thread, randomness or log."""

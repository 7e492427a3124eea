"""Floor 7: the command line and everything run by hand.  Each command of `continuo` is a module of its own."""

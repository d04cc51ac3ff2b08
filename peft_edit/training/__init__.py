"""Training of adapters on stored token pairs, whatever the method: its modules of all decoder blocks at once."""

"""What is asked of a base model: its blocks and sites, how it is run, its identity, its files."""

"""The PEFT tuners: what all methods share, and one folder a method, laid out as PEFT lays out its own."""

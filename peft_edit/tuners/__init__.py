"""The PEFT tuners: what all methods share, and one folder a method, laid out as PEFT lays out its own."""

# The methods, in the order in which they are shown: each is a folder here.
METHODS = ("sea", "hpr", "mean_difference", "iti", "diff")

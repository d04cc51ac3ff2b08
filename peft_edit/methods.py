"""The methods, in the order in which they are shown: each is a folder of `tuners`."""

METHODS = ("sea", "hpr", "mean_difference", "iti", "diff")

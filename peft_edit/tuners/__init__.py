"""The PEFT tuners, one package a method, laid out as PEFT lays out its own."""

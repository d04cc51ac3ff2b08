"""Which setting of a method is taken: benefit and damage of many are measured, and one is chosen by rule."""

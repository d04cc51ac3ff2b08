"""Pure mathematics of the two methods: tensors in, tensors out, no model in sight."""

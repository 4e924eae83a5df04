"""What a step computes, of tensors alone: operators composed of other operators and the library's convolutions."""

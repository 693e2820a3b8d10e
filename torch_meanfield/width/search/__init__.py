"""Finding populations of neurons in a model, and proving that they are exchangeable."""

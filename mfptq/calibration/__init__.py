"""What is known of the inputs of a model's linear layers: collected, kept in a file, put to use."""

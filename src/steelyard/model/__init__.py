"""The LLaMA family: architecture, file formats, tokenizer, chat rendering, and the digest that names a model."""

"""Where models and data come from: a package, a folder, a GGUF file, a hub."""

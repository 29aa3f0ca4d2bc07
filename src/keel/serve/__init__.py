"""A local model behind OpenAI's API: `keel serve`."""

"""One decoder for the LLaMA, Mistral, Qwen2 and GPT-2 families, its presets and its FLOP count."""

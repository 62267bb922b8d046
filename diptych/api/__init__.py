"""What clients speak: OpenAI's endpoints, SGLang's native ones, health, administration, metrics."""

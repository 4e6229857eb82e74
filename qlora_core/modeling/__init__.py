"""What several stages share about models: loading, quantizing, dtypes by device, tokenizer and template."""

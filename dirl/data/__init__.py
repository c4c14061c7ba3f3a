"""What enters: files and seeds -> problems, tokenised documents, and an endless stream of prompts."""

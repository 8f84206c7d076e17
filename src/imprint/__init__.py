"""Imprint: how much does a fine-tuned language model remember of its fine-tuning data?"""

"""Selective Token Masking for Axolotl: `plugins: stm`. The only package that imports Axolotl."""

"""Gradient methods: one file, one card each; `apply` attaches them to an optimizer."""

"""Weight methods: one file, one card each; `apply` puts them into a model."""

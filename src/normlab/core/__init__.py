"""The theory: partition Π, operation Φ, statistics, recovery Ψ, and the layer made of them."""

"""Layer states: KV, latent and recurrent, their codecs and policies, and attention over them."""

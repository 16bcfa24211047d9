"""Train sparse autoencoders into folders that `saezoo.load_sae` opens."""

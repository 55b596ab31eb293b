"""The network: a timm ViT encoder, the DPT head, and every weight format."""

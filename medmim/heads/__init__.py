"""What is attached to an encoder: pretraining decoders and segmentation decoders.

A pretraining decoder predicts the parts of a volume that its encoder was not shown. All of them have `unit`, the voxels
along (D, H, W) that are hidden together; `predict(encoder, x, idx_keep, idx_hidden)`, the voxels (B, M, V) of the
hidden units of volumes (B, C, D, H, W); and `of_encoder(encoder)`, the constructor's arguments that an encoder decides.
"""

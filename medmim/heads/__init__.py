"""What is attached to an encoder: pretraining decoders, classifiers, segmentation decoders."""

"""Prediction: images and videos in, depth maps, pictures, videos and point clouds out."""

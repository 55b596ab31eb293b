"""Teachers that label photographs: networks of this project, transformers models, ONNX files, functions and folders."""

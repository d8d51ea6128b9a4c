"""From a checkpoint to ONNX to a compiled artifact. The only package that imports onnx or TVM's compiler."""

"""Weights as codes of few bits: any number of bytes from one model.

    statistics.py         which inputs and outputs of each layer matter: second moments, weighted by the gradients of the loss
    block_statistics.py   the same for a model that does not fit in memory: one block at a time
    scratch.py            a temporary file for what does not have to be in memory
    step_sizes.py         one step size per row, so that a bit buys the same loss everywhere
    error_feedback.py     codes with the least error at the layer's outputs
    codes.py              codes in memory (8 bits) and on disk (Huffman codes)
    coded_model.py        all of it, for a whole model
    step_tuning.py        step sizes that are trained against the base model, all layers together

A layer computes with its codes in acip/modeling_acip.py (`CodedLinear`). A number of bytes becomes a version of each layer in
acip/sizing/byte_order.py.

A layer is coded in several versions, from coarse to fine. One order over all layers and versions, by saved loss per byte, gives the
best model for every number of bytes.
"""

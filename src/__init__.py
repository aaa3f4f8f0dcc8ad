"""ReDiff-Lightning: train and sample masked diffusion models that revise what they have already written."""

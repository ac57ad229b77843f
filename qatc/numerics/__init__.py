"""Scales, codes and rounding: the contract that training and every runtime share."""

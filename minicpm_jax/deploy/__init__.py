"""Making a trained model small and portable: post-training quantisation of whole models."""

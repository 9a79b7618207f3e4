"""The endpoints of SageMaker and Vertex AI: an ordinary HTTP frontend behind request heads that are translated."""

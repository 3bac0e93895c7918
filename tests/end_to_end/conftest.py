"""Four logical CPUs for the tests with replicas."""

import tensorflow as tf

# Once for the process, and before anything starts TensorFlow: pytest imports this file before it runs the first test.
tf.config.set_logical_device_configuration(tf.config.list_physical_devices('CPU')[0],
                                           [tf.config.LogicalDeviceConfiguration()] * 4)
tf.config.list_logical_devices()

/* Stands before PyTorch's CUDA libraries, which then count devices that are not there. */
static signed char devices = 0;
void set_device_count(int count) { devices = (signed char)count; }
signed char _ZN3c104cuda12device_countEv(void) { return devices; }

/* And for the driver: no context is active, so that autograd asks for no stream. */
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) {
    *flags = 0;
    *active = 0;
    return 0;
}

// The functions of NVML that data/runs/energy.cpp calls. Device 2 cannot tell; the others take up
// 250 mJ, and 500 mJ for device 1, between two calls.

extern "C" {

int nvmlInit_v2() { return 0; }
int nvmlShutdown() { return 0; }

int nvmlDeviceGetHandleByIndex_v2(unsigned number, void** device) {
  static unsigned long long counters[] = {1'000'000, 2'000'000, 0};
  if (number > 2) return 2;
  *device = counters + number;
  return 0;
}

int nvmlDeviceGetTotalEnergyConsumption(void* device, unsigned long long* millijoules) {
  auto* counter = static_cast<unsigned long long*>(device);
  if (*counter == 0) return 3;
  *counter += *counter >= 2'000'000 ? 500 : 250;
  *millijoules = *counter;
  return 0;
}
}

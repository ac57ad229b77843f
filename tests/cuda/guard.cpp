// What torch's build for CPUs lacks to take FakeTensors on GPUs through autograd: a guard of their
// devices that knows which one is the current one, and hooks that say that there are two.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

constexpr c10::DeviceIndex kDevices = 2;
thread_local c10::DeviceIndex current = 0;

c10::Device device() { return {c10::DeviceType::CUDA, current}; }
c10::Stream stream(c10::Device of) { return c10::Stream(c10::Stream::DEFAULT, of); }

struct Guard final : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  c10::Device getDevice() const override { return device(); }
  c10::Device exchangeDevice(c10::Device next) const override {
    c10::Device before = device();
    current = next.index() < 0 ? current : next.index();
    return before;
  }
  void setDevice(c10::Device next) const override { exchangeDevice(next); }
  void uncheckedSetDevice(c10::Device next) const noexcept override { exchangeDevice(next); }
  c10::Stream getStream(c10::Device of) const noexcept override { return stream(of); }
  c10::Stream exchangeStream(c10::Stream s) const noexcept override { return s; }
  c10::Stream getDefaultStream(c10::Device of) const override { return stream(of); }
  c10::DeviceIndex deviceCount() const noexcept override { return kDevices; }
};

struct Hooks final : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex current_device() const override { return current; }
  c10::DeviceIndex deviceCount() const override { return kDevices; }
  int getNumGPUs() const override { return kDevices; }
  void deviceSynchronize(c10::DeviceIndex) const override {}
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    return at::detail::getDefaultCPUGenerator();
  }
};

}  // namespace

namespace at {
C10_REGISTER_TYPED_CLASS(CUDAHooksRegistry, "CUDAHooks", Hooks);
}
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace tailor {

/// Bytes at the start of a page, zero at first, straight from the system (mmap): what reads past
/// the page cache and pinning ask for. Move-only; given back to the system on destruction.
class AlignedMemory {
 public:
  /// What poison() writes: read as bf16, fp32 or fp8 e4m3 it is a NaN, so that whatever is computed
  /// from bytes nobody filled shows it.
  static constexpr std::byte kPoison{0xFF};

  AlignedMemory() = default;
  /// `bytes` is rounded up to whole pages. With `huge_pages` it begins on 2 MiB and the system is
  /// asked for huge pages (MADV_HUGEPAGE): fewer TLB misses and fewer pages to pin; where it has
  /// none, small ones serve. Throws Error{does_not_fit} when the system has no room.
  explicit AlignedMemory(std::int64_t bytes, bool huge_pages = false);
  AlignedMemory(AlignedMemory&& other) noexcept;
  AlignedMemory& operator=(AlignedMemory&& other) noexcept;
  AlignedMemory(const AlignedMemory&) = delete;
  AlignedMemory& operator=(const AlignedMemory&) = delete;
  ~AlignedMemory();

  std::byte* data() const noexcept { return data_; }
  std::int64_t size() const noexcept { return size_; }
  std::span<std::byte> bytes() const noexcept { return {data_, static_cast<std::size_t>(size_)}; }

  /// For tests: fills [offset, offset + bytes) with kPoison.
  void poison(std::int64_t offset, std::int64_t bytes) const;
  void poison() const { poison(0, size_); }
  /// Whether every byte of [offset, offset + bytes) is kPoison.
  bool poisoned(std::int64_t offset, std::int64_t bytes) const;

 private:
  std::byte* data_ = nullptr;
  std::int64_t size_ = 0;
};

}  // namespace tailor

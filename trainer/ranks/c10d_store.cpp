#include "trainer/ranks/c10d_store.h"

#include <torch/csrc/distributed/c10d/PrefixStore.hpp>

#include "base/error.h"

namespace tailor {
namespace {

class C10dStore final : public RankStore {
 public:
  C10dStore(c10::intrusive_ptr<c10d::TCPStore> connection, std::string prefix, std::string place)
      : connection_(std::move(connection)),
        prefix_(std::move(prefix)),
        place_(std::move(place)),
        keys_(c10::make_intrusive<c10d::PrefixStore>(prefix_, connection_)) {}

  void set(const std::string& key, const std::string& text) override {
    asked([&] { keys_->set(key, std::vector<std::uint8_t>(text.begin(), text.end())); });
  }
  std::vector<std::string> get(const std::vector<std::string>& keys) override {
    std::vector<std::string> out;
    asked([&] {
      for (const auto& value : keys_->multiGet(keys)) out.emplace_back(value.begin(), value.end());
    });
    return out;
  }
  bool has(const std::string& key) override {
    bool out = false;
    asked([&] { out = keys_->check({key}); });
    return out;
  }
  std::int64_t add(const std::string& key, std::int64_t amount) override {
    std::int64_t out = 0;
    asked([&] { out = keys_->add(key, amount); });
    return out;
  }
  std::unique_ptr<RankStore> connect_again() override {
    c10::intrusive_ptr<c10d::TCPStore> other;
    asked([&] {
      c10d::TCPStoreOptions options;
      options.port = connection_->getPort();
      options.timeout = connection_->getTimeout();
      other = c10::make_intrusive<c10d::TCPStore>(connection_->getHost(), options);
    });
    return std::make_unique<C10dStore>(other, prefix_, place_);
  }

  const c10::intrusive_ptr<c10d::Store>& c10d() const { return keys_; }

 private:
  template <class Call>
  void asked(const Call& call) {
    try {
      call();
    } catch (const std::exception& fault) {
      throw Error(Fault::device,
                  {"the meeting point of the ranks is gone: " + first_line(fault.what()), place_,
                   "Look for the first failure among the ranks, then start again with --resume."});
    }
  }

  c10::intrusive_ptr<c10d::TCPStore> connection_;
  std::string prefix_, place_;
  c10::intrusive_ptr<c10d::Store> keys_;
};

}  // namespace

std::unique_ptr<RankStore> rank_store(c10::intrusive_ptr<c10d::TCPStore> connection,
                                      std::string prefix, std::string place) {
  return std::make_unique<C10dStore>(std::move(connection), std::move(prefix), std::move(place));
}

c10::intrusive_ptr<c10d::Store> c10d_store(RankStore& store) {
  auto* const ours = dynamic_cast<C10dStore*>(&store);
  TAILOR_CHECK(ours != nullptr, "not a store of meet_ranks()");
  return ours->c10d();
}

}  // namespace tailor

#pragma once

#include <array>
#include <string_view>
#include <utility>

#include "recipes/recipe.h"

namespace tailor {

/// The words a recipe writes for the values of an enum, in the order messages list them.
template <class E>
struct Choices;

template <>
struct Choices<RecordFormat> {
  static constexpr std::array<std::pair<std::string_view, RecordFormat>, 7> kWords = {
      {{"auto", RecordFormat::automatic},
       {"messages", RecordFormat::messages},
       {"sharegpt", RecordFormat::sharegpt},
       {"prompt_completion", RecordFormat::prompt_completion},
       {"alpaca", RecordFormat::alpaca},
       {"text", RecordFormat::text},
       {"tokenized", RecordFormat::tokenized}}};
};
template <>
struct Choices<TooLong> {
  static constexpr std::array<std::pair<std::string_view, TooLong>, 4> kWords = {
      {{"truncate", TooLong::truncate},
       {"drop", TooLong::drop},
       {"split", TooLong::split},
       {"error", TooLong::error}}};
};
template <>
struct Choices<Optimizer> {
  static constexpr std::array<std::pair<std::string_view, Optimizer>, 1> kWords = {
      {{"adamw", Optimizer::adamw}}};
};
template <>
struct Choices<LrScheduler> {
  static constexpr std::array<std::pair<std::string_view, LrScheduler>, 3> kWords = {
      {{"constant", LrScheduler::constant},
       {"linear", LrScheduler::linear},
       {"cosine", LrScheduler::cosine}}};
};
template <>
struct Choices<DeviceChoice> {
  static constexpr std::array<std::pair<std::string_view, DeviceChoice>, 3> kWords = {
      {{"auto", DeviceChoice::automatic},
       {"cuda", DeviceChoice::cuda},
       {"cpu", DeviceChoice::cpu}}};
};
template <>
struct Choices<ComputeType> {
  static constexpr std::array<std::pair<std::string_view, ComputeType>, 2> kWords = {
      {{"float32", ComputeType::float32}, {"bfloat16", ComputeType::bfloat16}}};
};
template <>
struct Choices<KeepActivations> {
  static constexpr std::array<std::pair<std::string_view, KeepActivations>, 3> kWords = {
      {{"auto", KeepActivations::automatic},
       {"none", KeepActivations::none},
       {"all", KeepActivations::all}}};
};
template <>
struct Choices<BaseFormat> {
  static constexpr std::array<std::pair<std::string_view, BaseFormat>, 5> kWords = {
      {{"as_is", BaseFormat::as_is},
       {"int4", BaseFormat::int4},
       {"nf4", BaseFormat::nf4},
       {"fp8", BaseFormat::fp8},
       {"bf16", BaseFormat::bf16}}};
};
template <>
struct Choices<ActivationHome> {
  static constexpr std::array<std::pair<std::string_view, ActivationHome>, 4> kWords = {
      {{"auto", ActivationHome::automatic},
       {"device", ActivationHome::device},
       {"host", ActivationHome::host},
       {"disk", ActivationHome::disk}}};
};
template <>
struct Choices<StateHome> {
  static constexpr std::array<std::pair<std::string_view, StateHome>, 3> kWords = {
      {{"auto", StateHome::automatic}, {"memory", StateHome::memory}, {"disk", StateHome::disk}}};
};
template <>
struct Choices<BudgetAction> {
  static constexpr std::array<std::pair<std::string_view, BudgetAction>, 2> kWords = {
      {{"checkpoint_stop", BudgetAction::checkpoint_stop}, {"warn", BudgetAction::warn}}};
};

/// The word a recipe writes for `value`: "as_is", "auto", ...
template <class E>
constexpr std::string_view choice_word(E value) {
  for (const auto& [word, choice] : Choices<E>::kWords) {
    if (choice == value) return word;
  }
  return "?";
}

}  // namespace tailor

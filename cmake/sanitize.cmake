if(TAILOR_SANITIZE)
  add_compile_options(-fsanitize=${TAILOR_SANITIZE} -fno-omit-frame-pointer -g)
  add_link_options(-fsanitize=${TAILOR_SANITIZE})
endif()

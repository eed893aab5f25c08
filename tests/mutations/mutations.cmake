# What is made of a mutation, a patch, and whether a change touches it.

# retention_changed_since(files revision): those of this project that are not as they were then.
function(retention_changed_since files revision)
  find_package(Git REQUIRED)
  set(changed)
  foreach(command IN ITEMS "diff;--name-only;${revision}"
                           "ls-files;--others;--exclude-standard")
    execute_process(
      COMMAND "${GIT_EXECUTABLE}" ${command}
      WORKING_DIRECTORY "${PROJECT_SOURCE_DIR}"
      OUTPUT_VARIABLE output
      RESULT_VARIABLE failed
      ERROR_VARIABLE problem)
    if(failed)
      message(FATAL_ERROR "RETENTION_MUTATIONS: expected none, all or a revision that git knows, "
                          "got '${revision}'\n${problem}")
    endif()
    string(REPLACE "\n" ";" output "${output}")
    list(APPEND changed ${output})
  endforeach()
  set(${files} "${changed}" PARENT_SCOPE)
endfunction()

# retention_sources(sources file): a file and all of this project's that it includes, directly or
# not, from the project's folder on.
set(include_folders include tests/cpp tests/emulator/include)
function(retention_sources sources file)
  get_property(known GLOBAL PROPERTY "RETENTION_SOURCES_${file}" SET)
  if(NOT known)
    set_property(GLOBAL PROPERTY "RETENTION_SOURCES_${file}" "${file}")  # in case it includes itself
    set(all "${file}")
    file(STRINGS "${PROJECT_SOURCE_DIR}/${file}" includes REGEX "^#include \"")
    foreach(include IN LISTS includes)
      string(REGEX REPLACE "^#include \"(.*)\".*" "\\1" include "${include}")
      foreach(folder IN LISTS include_folders)
        if(EXISTS "${PROJECT_SOURCE_DIR}/${folder}/${include}")
          retention_sources(more "${folder}/${include}")
          list(APPEND all ${more})
        endif()
      endforeach()
    endforeach()
    list(REMOVE_DUPLICATES all)
    set_property(GLOBAL PROPERTY "RETENTION_SOURCES_${file}" "${all}")
  endif()
  get_property(all GLOBAL PROPERTY "RETENTION_SOURCES_${file}")
  set(${sources} "${all}" PARENT_SCOPE)
endfunction()

# retention_is_touched(touched patch test file...): whether a mutation, or its test, is made of one of
# the files, or run by it.
function(retention_is_touched touched patch test)
  set(${touched} TRUE PARENT_SCOPE)
  string(REGEX REPLACE "^(warpgroup_)?(.*)_(bf16|fp16)_d.*" "\\2" kernel "${test}")
  retention_sources(sources "tests/cpp/${kernel}_test.cpp")
  foreach(file IN LISTS ARGN)
    if(file IN_LIST sources OR file STREQUAL "tests/mutations/${patch}"
       OR file MATCHES "^tests/emulator/(src|shadow)/|^tests/mutations/[a-z_]*\\.cmake$")
      return()
    endif()
  endforeach()
  set(${touched} FALSE PARENT_SCOPE)
endfunction()

# retention_patched(header text name patch): what `patch`, the text of a diff of one header, makes of
# it, and which one that is, below include/retention.
function(retention_patched header text name patch)
  if(NOT patch MATCHES "\n--- a/(include/retention/([^\n]*))\n\\+\\+\\+ b/([^\n]*)\n"
     OR NOT CMAKE_MATCH_1 STREQUAL CMAKE_MATCH_3)
    message(FATAL_ERROR "${name}: expected a patch of one header of include/retention")
  endif()
  set(file "${CMAKE_MATCH_1}")
  set(${header} "${CMAKE_MATCH_2}" PARENT_SCOPE)
  set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS "${PROJECT_SOURCE_DIR}/${file}")
  file(READ "${PROJECT_SOURCE_DIR}/${file}" whole)
  string(PREPEND whole "\n")

  set(rest "${patch}")
  string(FIND "${rest}" "\n@@ " start)
  while(NOT start EQUAL -1)
    string(SUBSTRING "${rest}" ${start} -1 rest)
    string(REGEX REPLACE "^\n@@ [^\n]*" "" rest "${rest}")
    string(FIND "${rest}" "\n@@ " start)
    string(SUBSTRING "${rest}" 0 ${start} hunk)
    string(REGEX REPLACE "\n\\+[^\n]*" "" before "${hunk}")
    string(REGEX REPLACE "\n-[^\n]*" "" after "${hunk}")
    foreach(lines IN ITEMS before after)
      string(REGEX REPLACE "\n[-+ ]" "\n" ${lines} "${${lines}}")
    endforeach()
    string(FIND "${whole}" "${before}" first)
    string(FIND "${whole}" "${before}" last REVERSE)
    if(first EQUAL -1 OR NOT first EQUAL last)
      set(times "more than once")
      if(first EQUAL -1)
        set(times "not at all")
      endif()
      message(SEND_ERROR "${name}: its lines must occur exactly once in ${file}, but occur ${times}. "
                         "Adapt it:\n${hunk}")
    endif()
    string(REPLACE "${before}" "${after}" whole "${whole}")
  endwhile()
  string(SUBSTRING "${whole}" 1 -1 whole)
  set(${text} "${whole}" PARENT_SCOPE)
endfunction()

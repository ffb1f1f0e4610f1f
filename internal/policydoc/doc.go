// Package policydoc reads the policy documents that people write, strictly: unknown keys are errors, and every error
// names file, line, column, the offending value and what was expected.
//
// It is the one importer of the YAML library; configuration files are decoded through it too.
package policydoc

package house

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"path"
	"slices"
	"strconv"
	"strings"
)

// Ceilings for hand-written Go.
const (
	maxFileLines = 600
	maxFuncLines = 70
)

// goFile is one parsed file.
type goFile struct {
	name      string
	fset      *token.FileSet
	ast       *ast.File
	test      bool
	generated bool
}

func parseGo(name string, src []byte) (*goFile, error) {
	fset := token.NewFileSet()
	f, err := parser.ParseFile(fset, name, src, parser.ParseComments|parser.SkipObjectResolution)
	if err != nil {
		return nil, err
	}
	return &goFile{name: name, fset: fset, ast: f, test: strings.HasSuffix(name, "_test.go"), generated: ast.IsGenerated(f)}, nil
}

func (f *goFile) line(p token.Pos) int { return f.fset.Position(p).Line }

func (f *goFile) finding(p token.Pos, format string, args ...any) finding {
	return finding{file: f.name, line: f.line(p), reason: fmt.Sprintf(format, args...)}
}

// checkPackageDocs wants a package comment in one file of every directory that has files other than tests.
func checkPackageDocs(files []*goFile) []finding {
	first, documented := map[string]*goFile{}, map[string]bool{}
	var dirs []string
	for _, f := range files {
		if f.test {
			continue
		}
		dir := path.Dir(f.name)
		if first[dir] == nil {
			first[dir] = f
			dirs = append(dirs, dir)
		}
		if f.ast.Doc != nil && strings.TrimSpace(f.ast.Doc.Text()) != "" {
			documented[dir] = true
		}
	}
	var out []finding
	for _, dir := range dirs {
		if f := first[dir]; !documented[dir] {
			out = append(out, f.finding(f.ast.Package, "package %s has no package comment in any file", f.ast.Name.Name))
		}
	}
	return out
}

// checkExportedDocs wants a comment on every exported name at the top level.
func checkExportedDocs(f *goFile) []finding {
	if f.test || f.generated {
		return nil
	}
	var out []finding
	for _, decl := range f.ast.Decls {
		switch d := decl.(type) {
		case *ast.FuncDecl:
			if d.Name.IsExported() && exportedReceiver(d) && d.Doc == nil {
				out = append(out, f.finding(d.Pos(), "exported func %s has no comment", d.Name.Name))
			}
		case *ast.GenDecl:
			for _, spec := range d.Specs {
				out = append(out, checkSpecDoc(f, d, spec)...)
			}
		}
	}
	return out
}

func exportedReceiver(d *ast.FuncDecl) bool {
	if d.Recv == nil {
		return true
	}
	t := d.Recv.List[0].Type
	for {
		switch x := t.(type) {
		case *ast.StarExpr:
			t = x.X
		case *ast.IndexExpr:
			t = x.X
		case *ast.IndexListExpr:
			t = x.X
		case *ast.Ident:
			return x.IsExported()
		default:
			return false
		}
	}
}

// checkSpecDoc accepts a comment on the group, above the name, or behind it.
func checkSpecDoc(f *goFile, d *ast.GenDecl, spec ast.Spec) []finding {
	switch s := spec.(type) {
	case *ast.TypeSpec:
		if s.Name.IsExported() && d.Doc == nil && s.Doc == nil && s.Comment == nil {
			return []finding{f.finding(s.Pos(), "exported type %s has no comment", s.Name.Name)}
		}
	case *ast.ValueSpec:
		for _, name := range s.Names {
			if name.IsExported() && d.Doc == nil && s.Doc == nil && s.Comment == nil {
				return []finding{f.finding(s.Pos(), "exported %s %s has no comment", d.Tok, name.Name)}
			}
		}
	}
	return nil
}

// checkNoInit refuses func init: what a package needs is made by whoever uses it, in an order that can be read.
func checkNoInit(f *goFile) []finding {
	if f.generated {
		return nil
	}
	var out []finding
	for _, decl := range f.ast.Decls {
		if d, ok := decl.(*ast.FuncDecl); ok && d.Recv == nil && d.Name.Name == "init" {
			out = append(out, f.finding(d.Pos(), "func init: make it a function that somebody calls"))
		}
	}
	return out
}

// checkNoSleep refuses time.Sleep in tests, under whatever name the package time was imported. A file that uses
// testing/synctest may: there the clock is a fake, and sleeping is how it is moved.
func checkNoSleep(f *goFile) []finding {
	if !f.test || f.imports("testing/synctest") {
		return nil
	}
	var out []finding
	f.selectors("time", func(sel *ast.SelectorExpr, _ *ast.CallExpr) {
		if sel.Sel.Name == "Sleep" {
			out = append(out, f.finding(sel.Pos(), "time.Sleep in a test: wait for the event, or use testing/synctest"))
		}
	})
	return out
}

func (f *goFile) imports(importPath string) bool {
	return slices.ContainsFunc(f.ast.Imports, func(imp *ast.ImportSpec) bool {
		p, err := strconv.Unquote(imp.Path.Value)
		return err == nil && p == importPath
	})
}

// selectors visits every NAME.X where NAME is the imported package, with the call that X is the function of, if it is one.
func (f *goFile) selectors(importPath string, visit func(*ast.SelectorExpr, *ast.CallExpr)) {
	name := ""
	for _, imp := range f.ast.Imports {
		if p, err := strconv.Unquote(imp.Path.Value); err == nil && p == importPath {
			name = path.Base(importPath)
			if imp.Name != nil {
				name = imp.Name.Name
			}
		}
	}
	if name == "" {
		return
	}
	calls := map[*ast.SelectorExpr]*ast.CallExpr{}
	ast.Inspect(f.ast, func(n ast.Node) bool {
		switch x := n.(type) {
		case *ast.CallExpr:
			if sel, ok := x.Fun.(*ast.SelectorExpr); ok {
				calls[sel] = x
			}
		case *ast.SelectorExpr:
			if id, ok := x.X.(*ast.Ident); ok && id.Name == name {
				visit(x, calls[x])
			}
		}
		return true
	})
}

// checkSizes keeps the ceilings on files and functions.
func checkSizes(f *goFile) []finding {
	if f.generated {
		return nil
	}
	var out []finding
	lines := f.fset.File(f.ast.Pos()).LineCount()
	if lines > maxFileLines && !f.fileAllows("allow-long") {
		out = append(out, finding{file: f.name, line: 1, reason: fmt.Sprintf("%d lines, the ceiling is %d", lines, maxFileLines)})
	}
	for _, decl := range f.ast.Decls {
		d, ok := decl.(*ast.FuncDecl)
		if !ok {
			continue
		}
		n := f.line(d.End()) - f.line(d.Type.Pos()) + 1
		if n > maxFuncLines && !groupAllows(d.Doc, "allow-long") {
			out = append(out, f.finding(d.Type.Pos(), "func %s has %d lines, the ceiling is %d", d.Name.Name, n, maxFuncLines))
		}
	}
	return out
}

// fileAllows looks for an exception above the package clause.
func (f *goFile) fileAllows(what string) bool {
	for _, g := range f.ast.Comments {
		if g.Pos() < f.ast.Package && groupAllows(g, what) {
			return true
		}
	}
	return false
}

func groupAllows(g *ast.CommentGroup, what string) bool {
	if g == nil {
		return false
	}
	for _, c := range g.List {
		if allows(c.Text, what) {
			return true
		}
	}
	return false
}

// allows reports whether a comment is the exception; without a reason it is none.
func allows(comment, what string) bool {
	reason, ok := strings.CutPrefix(comment, "//house:"+what+" ")
	return ok && strings.TrimSpace(reason) != ""
}

// checkWrapped wants %w in every fmt.Errorf that is given an error.
func checkWrapped(f *goFile) []finding {
	if f.test || f.generated {
		return nil
	}
	exempt := map[int]bool{}
	for _, g := range f.ast.Comments {
		for _, c := range g.List {
			if allows(c.Text, "allow-nowrap") {
				line := f.line(c.Pos())
				exempt[line], exempt[line+1] = true, true
			}
		}
	}
	var out []finding
	f.selectors("fmt", func(sel *ast.SelectorExpr, call *ast.CallExpr) {
		if sel.Sel.Name != "Errorf" || call == nil || len(call.Args) < 2 || exempt[f.line(call.Pos())] {
			return
		}
		format, known := literal(call.Args[0])
		if !known || strings.Contains(format, "%w") {
			return
		}
		for _, arg := range call.Args[1:] {
			if isError(arg) {
				out = append(out, f.finding(call.Pos(), "fmt.Errorf is given an error but does not wrap it with %%w"))
				return
			}
		}
	})
	return out
}

// literal joins a format that is written as one or several string constants.
func literal(e ast.Expr) (string, bool) {
	switch x := e.(type) {
	case *ast.BasicLit:
		s, err := strconv.Unquote(x.Value)
		return s, err == nil
	case *ast.BinaryExpr:
		left, ok1 := literal(x.X)
		right, ok2 := literal(x.Y)
		return left + right, ok1 && ok2
	}
	return "", false
}

// isError goes by the name, as there are no types here: err, or something that ends in Err, or its Error().
func isError(e ast.Expr) bool {
	if call, ok := e.(*ast.CallExpr); ok {
		sel, ok := call.Fun.(*ast.SelectorExpr)
		return ok && sel.Sel.Name == "Error" && isError(sel.X)
	}
	id, ok := e.(*ast.Ident)
	return ok && (id.Name == "err" || strings.HasSuffix(id.Name, "Err"))
}

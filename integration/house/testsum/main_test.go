package main

import (
	"strings"
	"testing"
)

var runCases = []struct {
	name string
	in   []string
	ok   bool
	want []string
	last string
}{
	{
		name: "all is well",
		in: []string{
			`{"Action":"start","Package":"p"}`, `{"Action":"output","Package":"p","Test":"TestA","Output":"noise\n"}`,
			`{"Action":"pass","Package":"p","Test":"TestA"}`, `{"Action":"pass","Package":"p","Elapsed":1.5}`,
			`{"Action":"start","Package":"q"}`, `{"Action":"skip","Package":"q"}`,
		},
		ok: true, want: []string{"ok      p (1.5s)"}, last: "1 passed, 0 failed, 0 skipped",
	},
	{
		name: "a failure is shown in full",
		in: []string{
			`{"Action":"start","Package":"p"}`, `{"Action":"output","Package":"p","Test":"TestA","Output":"    a_test.go:1: broken\n"}`,
			`{"Action":"fail","Package":"p","Test":"TestA"}`, `{"Action":"fail","Package":"p"}`,
		},
		want: []string{"FAILED p TestA\n        a_test.go:1: broken\n", "FAIL    p"}, last: "0 passed, 1 failed, 0 skipped",
	},
	{
		name: "skips are listed by reason",
		in: []string{
			`{"Action":"start","Package":"p"}`, `{"Action":"pass","Package":"p","Test":"TestA"}`,
			`{"Action":"output","Package":"p","Test":"TestB","Output":"=== RUN   TestB\n"}`,
			`{"Action":"output","Package":"p","Test":"TestB","Output":"    b_test.go:9: needs root\n"}`,
			`{"Action":"output","Package":"p","Test":"TestB","Output":"--- SKIP: TestB (0.00s)\n"}`,
			`{"Action":"skip","Package":"p","Test":"TestB"}`, `{"Action":"pass","Package":"p"}`,
		},
		ok: true, want: []string{"not run:\n  needs root\n    p TestB\n"}, last: "1 passed, 0 failed, 1 skipped",
	},
	{
		name: "a package that does not build",
		in: []string{
			`{"ImportPath":"p [p.test]","Action":"build-output","Output":"./a.go:1: syntax error\n"}`,
			`{"ImportPath":"p [p.test]","Action":"build-fail"}`, `{"Action":"start","Package":"p"}`,
			`{"Action":"output","Package":"p","Output":"FAIL\tp [build failed]\n"}`, `{"Action":"fail","Package":"p"}`,
		},
		want: []string{"syntax error", "[build failed]"}, last: "0 passed, 1 failed, 0 skipped",
	},
	{
		name: "a package that dies in a test",
		in: []string{
			`{"Action":"start","Package":"p"}`, `{"Action":"pass","Package":"p","Test":"TestA"}`,
			`{"Action":"output","Package":"p","Test":"TestB","Output":"fatal error: all goroutines are asleep\n"}`, `{"Action":"fail","Package":"p"}`,
		},
		want: []string{"p TestB\n    fatal error"}, last: "1 passed, 1 failed, 0 skipped",
	},
	{
		name: "output that ends too soon",
		in:   []string{`{"Action":"start","Package":"p"}`, `{"Action":"pass","Package":"p","Test":"TestA"}`},
		want: []string{"p did not come to its end"}, last: "1 passed, 1 failed, 0 skipped",
	},
	{name: "nothing", want: []string{"no test ran"}, last: "0 passed, 0 failed, 0 skipped"},
	{name: "only words", in: []string{"go: no such tool", `{"x":1}`}, want: []string{"go: no such tool\n{\"x\":1}\nno test ran"}, last: "0 passed, 0 failed, 0 skipped"},
	{
		name: "only skips",
		in:   []string{`{"Action":"start","Package":"p"}`, `{"Action":"skip","Package":"p","Test":"TestA"}`, `{"Action":"pass","Package":"p"}`},
		want: []string{"no reason given"}, last: "0 passed, 0 failed, 1 skipped",
	},
}

func TestRun(t *testing.T) {
	for _, c := range runCases {
		t.Run(c.name, func(t *testing.T) {
			var out strings.Builder
			ok, err := run(strings.NewReader(strings.Join(c.in, "\n")), &out)
			if err != nil || ok != c.ok {
				t.Errorf("run gave %v, %v", ok, err)
			}
			for _, want := range c.want {
				if !strings.Contains(out.String(), want) {
					t.Errorf("no %q in:\n%s", want, out.String())
				}
			}
			if !strings.HasSuffix(out.String(), "\n"+c.last+"\n") && out.String() != c.last+"\n" {
				t.Errorf("last line is not %q:\n%s", c.last, out.String())
			}
		})
	}
}

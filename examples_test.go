// The samples for Prometheus and Grafana fit what the code exports.
package holdfast_test

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/holdfast-proxy/caddy-holdfast/internal/registry"
)

// The alerts fire when they should, and not else.
func TestAlerts(t *testing.T) {
	const alerts = "examples/prometheus/alerts.yml"
	promtool(t, "check", "rules", alerts)
	promtool(t, "test", "rules", "testdata/prometheus/alerts_test.yml")
	tests := read(t, "testdata/prometheus/alerts_test.yml")
	parts := strings.Split(read(t, alerts), "- alert: ")
	for _, part := range parts[1:] {
		name, rule, _ := strings.Cut(part, "\n")
		if !strings.Contains(tests, `alertname="`+name+`"`) {
			t.Errorf("%s: no test shows that it fires", name)
		}
		wantExported(t, name, rule)
	}
	if len(parts) < 5 {
		t.Errorf("got %d alerts, want more", len(parts)-1)
	}
}

// The dashboard can be imported: it names no data source of ours, and its queries are of
// what there is.
func TestDashboard(t *testing.T) {
	var dashboard struct {
		Templating struct {
			List []struct {
				Name, Type string
				Query      any
			}
		}
		Panels []struct {
			ID         int
			Title      string
			Datasource struct{ UID string }
			Targets    []struct{ Expr, LegendFormat string }
		}
	}
	if err := json.Unmarshal([]byte(read(t, "examples/grafana/holdfast.json")), &dashboard); err != nil {
		t.Fatal(err)
	}
	variables := map[string]bool{"__rate_interval": true}
	for _, v := range dashboard.Templating.List {
		variables[v.Name] = true
		wantExported(t, v.Name, fmt.Sprint(v.Query))
	}
	var rules strings.Builder
	rules.WriteString("groups:\n- name: dashboard\n  rules:\n")
	seen := make(map[int]bool)
	inBraces := regexp.MustCompile(`\$\{?(\w+)`)
	for _, p := range dashboard.Panels {
		if seen[p.ID] || p.Datasource.UID != "${datasource}" || len(p.Targets) == 0 {
			t.Errorf("%s: got id %d, data source %q and %d queries; want another id, the variable, and some", p.Title, p.ID, p.Datasource.UID, len(p.Targets))
		}
		seen[p.ID] = true
		for _, target := range p.Targets {
			wantExported(t, p.Title, target.Expr+target.LegendFormat)
			for _, v := range inBraces.FindAllStringSubmatch(target.Expr, -1) {
				if !variables[v[1]] {
					t.Errorf("%s: %s has an unknown variable %s", p.Title, target.Expr, v[1])
				}
			}
			expr := strings.NewReplacer("$__rate_interval", "5m", "$route", ".*").Replace(target.Expr)
			fmt.Fprintf(&rules, "  - {record: \"panel:%d\", expr: %q}\n", p.ID, expr)
		}
	}
	if len(seen) < 10 {
		t.Errorf("got %d panels, want more", len(seen))
	}
	file := filepath.Join(t.TempDir(), "rules.yml")
	if err := os.WriteFile(file, []byte(rules.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	promtool(t, "check", "rules", "--lint=none", file)
}

// wantExported checks that each metric in a query is exported and has the labels that the
// query uses, and that their values can occur.
func wantExported(t *testing.T, where, query string) {
	t.Helper()
	metrics := exported(t)
	labels := map[string]bool{"instance": true, "le": true}
	names := regexp.MustCompile(`\bcaddy_\w+`).FindAllString(query, -1)
	for _, name := range names {
		own, ok := metrics[name]
		if !ok {
			t.Errorf("%s: %s is not exported", where, name)
		}
		for _, label := range own {
			labels[label] = true
		}
	}
	if len(names) == 0 && strings.Contains(query, "_") {
		t.Errorf("%s: %s is about none of our metrics", where, query)
	}
	for _, m := range regexp.MustCompile(`\b(caddy_\w+)\{([^}]*)\}`).FindAllStringSubmatch(query, -1) {
		for _, matcher := range regexp.MustCompile(`(\w+)(?:=~|!~|!=|=)"([^"]*)"`).FindAllStringSubmatch(m[2], -1) {
			if !strings.Contains(" "+strings.Join(metrics[m[1]], " ")+" ", " "+matcher[1]+" ") {
				t.Errorf("%s: %s has no label %s", where, m[1], matcher[1])
			}
			for value := range strings.SplitSeq(matcher[2], "|") {
				if value != "$route" && !values(t)[value] {
					t.Errorf("%s: %s of %s is never %s", where, matcher[1], m[1], value)
				}
			}
		}
	}
	for _, list := range regexp.MustCompile(`\b(?:by|on|without|ignoring) \(([^)]*)\)|\$labels\.(\w+)|\{\{(\w+)\}\}`).FindAllStringSubmatch(query, -1) {
		for _, label := range regexp.MustCompile(`\w+`).FindAllString(strings.Join(list[1:], " "), -1) {
			if !labels[label] {
				t.Errorf("%s: none of its metrics has a label %s", where, label)
			}
		}
	}
}

// exported returns the labels of all metrics by name.
func exported(t *testing.T) map[string][]string {
	t.Helper()
	descs := make(chan *prometheus.Desc, 1000)
	for _, c := range registry.New().Collectors() {
		c.Describe(descs)
	}
	close(descs)
	metrics := make(map[string][]string)
	for d := range descs {
		m := regexp.MustCompile(`fqName: "(\w+)".*variableLabels: \{([^}]*)\}`).FindStringSubmatch(d.String())
		if m == nil {
			t.Fatalf("cannot read %v", d)
		}
		labels := strings.FieldsFunc(m[2], func(r rune) bool { return r == ',' || r == ' ' })
		metrics[m[1]] = labels
		if strings.HasSuffix(m[1], "_seconds") {
			for _, suffix := range []string{"_bucket", "_sum", "_count"} {
				metrics[m[1]+suffix] = labels
			}
		}
	}
	return metrics
}

// values are those that labels may have, but for names: the README tells them all, and
// so does the source.
func values(t *testing.T) map[string]bool {
	t.Helper()
	all := map[string]bool{"in": true, "out": true, "resumed": true}
	readme := read(t, "README.md")
	for _, file := range []string{"state.go", "limits.go"} {
		for _, m := range regexp.MustCompile(`"([a-z_]+)"`).FindAllStringSubmatch(read(t, filepath.Join("internal/registry", file)), -1) {
			all[m[1]] = true
		}
	}
	for _, m := range regexp.MustCompile("`([a-z_]+)`").FindAllStringSubmatch(readme, -1) {
		all[m[1]] = true
	}
	return all
}

// promtool runs Prometheus' tool, which must be content.
func promtool(t *testing.T, args ...string) {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "promtool", args...).CombinedOutput()
	if err != nil {
		t.Errorf("promtool %s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

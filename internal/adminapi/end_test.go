// This file tests showing and ending one connection.

package adminapi

import (
	"net/http"
	"strings"
	"testing"

	"github.com/holdfast-proxy/caddy-holdfast/internal/registry"
)

func TestShow(t *testing.T) {
	s := newSite(t)
	c, _ := s.open("a", "app:80", "10.0.0.1")
	var got registry.View
	s.get("/connections/"+c.ID(), &got)
	if got.ID != c.ID() || got.State != "open" || got.Reason != "" {
		t.Errorf("got %+v, want the open connection", got)
	}
	c.Close(registry.Ending{Reason: registry.Lifetime})
	s.get("/connections/"+c.ID(), &got)
	if got.State != "closing" || got.Reason != registry.Lifetime {
		t.Errorf("got %+v, want it closing, and why", got)
	}
	c.Done()
	for _, method := range []string{http.MethodGet, http.MethodDelete} {
		for _, id := range []string{c.ID(), "none", "00000000-0000-0000-0000-000000000000", "%2e%2e", strings.ToUpper(c.ID())} {
			if res, body := s.ask(method, "/connections/"+id); res.StatusCode != http.StatusNotFound {
				t.Errorf("%s %s: got %d %q, want 404", method, id, res.StatusCode, body)
			}
		}
	}
}

func TestEnd(t *testing.T) {
	longest := strings.Repeat("x", 123)
	for _, test := range []struct {
		query  string
		status int
		want   registry.Ending
	}{
		{"", 204, registry.Ending{Reason: registry.Admin}},
		{values("code", "1001"), 204, registry.Ending{Reason: registry.Admin, Code: 1001}},
		{values("code", "4999", "reason", "maintenance, back at 5"), 204, registry.Ending{Reason: registry.Admin, Code: 4999, Text: "maintenance, back at 5"}},
		{values("reason", "grüße"), 204, registry.Ending{Reason: registry.Admin, Text: "grüße"}},
		{values("reason", longest), 204, registry.Ending{Reason: registry.Admin, Text: longest}},
		{values("reason", ""), 204, registry.Ending{Reason: registry.Admin}},
		{values("code", "1012"), 204, registry.Ending{Reason: registry.Admin, Code: 1012}},
		{values("code", ""), 400, registry.Ending{}},
		{values("code", "abc"), 400, registry.Ending{}},
		{values("code", "0"), 400, registry.Ending{}},
		{values("code", "999"), 400, registry.Ending{}},
		{values("code", "1004"), 400, registry.Ending{}},
		{values("code", "1005"), 400, registry.Ending{}},
		{values("code", "1006"), 400, registry.Ending{}},
		{values("code", "1015"), 400, registry.Ending{}},
		{values("code", "2000"), 400, registry.Ending{}},
		{values("code", "5000"), 400, registry.Ending{}},
		{values("code", "66537"), 400, registry.Ending{}}, // 1001 in 16 bits
		{values("code", "99999"), 400, registry.Ending{}},
		{values("code", "-1001"), 400, registry.Ending{}},
		{values("code", "+1001"), 400, registry.Ending{}},
		{values("code", "1001.0"), 400, registry.Ending{}},
		{values("code", " 1001"), 400, registry.Ending{}},
		{values("reason", longest+"x"), 400, registry.Ending{}},
		{values("reason", strings.Repeat("é", 62)), 400, registry.Ending{}},
		{values("reason", "\xff"), 400, registry.Ending{}},
		{values("code", "1001", "reason", strings.Repeat("x", 5000)), 400, registry.Ending{}},
	} {
		s := newSite(t)
		c, o := s.open("a", "app:80", "10.0.0.1")
		other, others := s.open("a", "app:80", "10.0.0.1")
		res, body := s.ask(http.MethodDelete, "/connections/"+c.ID()+test.query)
		if res.StatusCode != test.status || test.status == http.StatusNoContent && body != "" || test.status != http.StatusNoContent && body == "" {
			t.Errorf("%q: got %d %q, want %d", test.query, res.StatusCode, body, test.status)
		}
		if test.status == http.StatusNoContent {
			if len(o.ends) != 1 || o.ends[0] != test.want || c.State() != registry.Closing {
				t.Errorf("%q: got the owner told %v, want %v once", test.query, o.ends, test.want)
			}
		} else if len(o.ends) != 0 || c.State() != registry.Open {
			t.Errorf("%q: got the owner told %v after a refusal, want nothing", test.query, o.ends)
		}
		if len(others.ends) != 0 || other.State() != registry.Open {
			t.Errorf("%q: got another connection told %v", test.query, others.ends)
		}
	}
}

// Ending a connection that ends already succeeds, and changes nothing.
func TestEndTwice(t *testing.T) {
	s := newSite(t)
	c, o := s.open("a", "app:80", "10.0.0.1")
	c.Close(registry.Ending{Reason: registry.Idle})
	for range 2 {
		if res, body := s.ask(http.MethodDelete, "/connections/"+c.ID()+"?code=4000"); res.StatusCode != http.StatusNoContent {
			t.Errorf("got %d %q, want 204", res.StatusCode, body)
		}
	}
	if len(o.ends) != 1 || c.Ending().Reason != registry.Idle {
		t.Errorf("got the owner told %v, reason %s, want the first one only", o.ends, c.Ending().Reason)
	}
}

// One that is still being dialed can be ended as well.
func TestEndWhileConnecting(t *testing.T) {
	s := newSite(t)
	o := new(owner)
	c, err := s.reg.Admit(s.reg.Retain(registry.WebSocket, "a"), registry.Info{Kind: registry.WebSocket}, o)
	if err != nil {
		t.Fatal(err)
	}
	if res, body := s.ask(http.MethodDelete, "/connections/"+c.ID()); res.StatusCode != http.StatusNoContent || len(o.ends) != 1 {
		t.Errorf("got %d %q, owner told %v, want 204 and the end", res.StatusCode, body, o.ends)
	}
}

// What the filters select ends, what they do not stays; without a filter nothing does.
func TestEndSelected(t *testing.T) {
	for query, want := range map[string]struct {
		status  int
		body    string
		a, b, c bool // which of the three have ended
	}{
		"?route=a&window=0":                             {202, `{"matched":2}`, true, true, false},
		"?route=a&client=10.0.0.2&window=0":             {202, `{"matched":1}`, false, true, false},
		"?upstream=app:81&window=0s":                    {202, `{"matched":1}`, false, false, true},
		"?kind=websocket&state=open&min_age=0&window=0": {202, `{"matched":3}`, true, true, true},
		"?kind=passthrough&window=0":                    {202, `{"matched":0}`, false, false, false},
		"?min_age=1h&window=0":                          {202, `{"matched":0}`, false, false, false},
		"?route=a":                                      {202, `{"matched":2}`, false, false, false}, // in good time
		"":                                              {400, "no filter", false, false, false},
		"?window=0":                                     {400, "no filter", false, false, false},
		"?route=&min_age=0":                             {400, `route is empty: ""`, false, false, false},
		"?min_age=0&window=0":                           {202, `{"matched":3}`, true, true, true},
		"?route=a&window=-1s":                           {400, `window must be a duration: "-1s"`, false, false, false},
		"?route=a&window=soon":                          {400, `window must be a duration: "soon"`, false, false, false},
		"?route=a&code=1005":                            {400, `code must be a close code that may be sent: "1005"`, false, false, false},
		"?route=a&limit=1":                              {400, `unknown parameter "limit"`, false, false, false},
		"?route=a&state=ajar":                           {400, `unknown state "ajar"`, false, false, false},
		"?route=a&kind=telegraph":                       {400, `unknown kind "telegraph"`, false, false, false},
		"?route=a&reason=" + strings.Repeat("x", 124):   {400, "reason must be UTF-8 of at most 123 bytes", false, false, false},
	} {
		t.Run(query, func(t *testing.T) {
			s := newSite(t)
			_, a := s.open("a", "app:80", "10.0.0.1")
			_, b := s.open("a", "app:80", "10.0.0.2")
			_, c := s.open("b", "app:81", "10.0.0.1")
			res, body := s.ask("DELETE", "/connections"+query)
			if res.StatusCode != want.status || !strings.Contains(body, want.body) {
				t.Errorf("got %d %q, want %d %q", res.StatusCode, body, want.status, want.body)
			}
			for name, o := range map[*owner]bool{a: want.a, b: want.b, c: want.c} {
				if ended := len(name.ends) == 1; ended != o {
					t.Errorf("got ends %v, want ended %t", name.ends, o)
				}
			}
		})
	}
}

func TestEndSelectedTellsClients(t *testing.T) {
	s := newSite(t)
	_, o := s.open("a", "app:80", "10.0.0.1")
	s.ask("DELETE", "/connections?route=a&window=0&code=4000&reason=moved")
	want := registry.Ending{Reason: registry.Admin, Code: 4000, Text: "moved"}
	if len(o.ends) != 1 || o.ends[0] != want {
		t.Errorf("got %+v, want %+v", o.ends, want)
	}
}
